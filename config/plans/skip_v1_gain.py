# SkipV1Former with a learned gain on what each head takes from layer 0.
# python train.py config/plans/skip_v1_gain.py
attention = 'layer0(8/4-4, gain=head)'
