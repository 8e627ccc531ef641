# A size, to put behind any model: the small one of the published experiments 1 and 2.
# python train.py config/reflex_422.py config/sizes/size_512_256.py
n_embd = 512
block_size = 256
