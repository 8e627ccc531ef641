# Own keys throughout; the values as in reflex_all: one head of every earlier layer.
# python train.py config/plans/reflex_all_values.py
attention = 'reflex_all_values'
