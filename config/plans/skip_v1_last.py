# Values of layer 0 in half of the heads, in the last third of the layers alone.
# python train.py config/plans/skip_v1_last.py
attention = 'vanilla*4 layer0(8/4-4)*2'
