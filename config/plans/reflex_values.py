# Own keys throughout; two heads take the values of the layer before, two those of the one before that.
# python train.py config/plans/reflex_values.py
attention = 'reflex(8/4-2-2)'  # keys/values
