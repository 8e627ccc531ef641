# Four own heads, two of the layer before, two of layer 0.
# python train.py config/plans/first_422.py
attention = 'layer0(4-2-2)'
