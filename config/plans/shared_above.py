# The upper half reads the keys and values of the middle layer, and has none of its own (YOCO's upper half).
# python train.py config/plans/shared_above.py
attention = 'shared_above(2)'
