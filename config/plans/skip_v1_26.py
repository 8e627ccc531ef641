# Beyond SkipV1Former: own keys throughout; three heads in four take layer 0's values.
# python train.py config/plans/skip_v1_26.py
attention = 'layer0(8/2-6)'  # keys/values
