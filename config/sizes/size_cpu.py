# A size, to put behind any model: the published one shrunk for a laptop, some minutes per run.
# python train.py config/reflex_422.py config/sizes/size_cpu.py --dataset=stdlib
n_embd = 128
block_size = 256
batch_size = 16
max_iters = 2000
warmup_iters = 100
eval_iters = 20
compile = False
