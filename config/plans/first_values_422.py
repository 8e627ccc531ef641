# Own keys throughout; two heads take the values of the layer before, two those of layer 0.
# python train.py config/plans/first_values_422.py
attention = 'layer0(8/4-2-2)'  # keys/values
