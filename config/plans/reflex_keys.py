# Own values throughout; two heads take the keys of the layer before, two those of the one before that.
# python train.py config/plans/reflex_keys.py
attention = 'reflex(4-2-2/8)'  # keys/values
