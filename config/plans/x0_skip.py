# Vanilla with an x0 skip, as nanochat and modded-nanogpt have it: each block reads a learned mix of the
# stream and the token's embedding.
# python train.py config/plans/x0_skip.py
x0_skip = True
