# The upper half projects keys and values of its own, from the input of the middle layer.
# python train.py config/plans/midpoint.py
attention = 'midpoint(2)'
