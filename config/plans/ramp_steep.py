# Layer 0's values in 0, 0, 2, 4, 6, 8 heads of layer 0, 1, ...: SkipV1Former's cache, all of them at the top.
# python train.py config/plans/ramp_steep.py
attention = 'vanilla*2 layer0(8/6-2) layer0(8/4-4) layer0(8/2-6) layer0(8/0-8)'
