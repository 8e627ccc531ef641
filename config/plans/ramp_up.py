# Layer 0's values in 0, 2, 3, 4, 5, 6 heads of layer 0, 1, ...: SkipV1Former's cache, more of them above.
# python train.py config/plans/ramp_up.py
attention = 'vanilla layer0(8/6-2) layer0(8/5-3) layer0(8/4-4) layer0(8/3-5) layer0(8/2-6)'
