# Beyond SkipV1Former: own keys throughout; three heads in four take layer 0's values.
# python train.py config/skip_v1_26.py
attention = 'first'
head_split = '8/2-6'  # keys/values
