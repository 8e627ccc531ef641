# As skip_v1_last, with a learned gain on what each head takes from layer 0.
# python train.py config/plans/skip_v1_last_gain.py
attention = 'vanilla*4 layer0(8/4-4, gain=head)*2'
