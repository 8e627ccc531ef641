# A small reflex GPT on the Python standard library's own sources: two minutes on two CPU cores, no network.
# python train.py config/quickstart.py
dataset = 'stdlib'
attention = 'reflex(4-2-2)'
n_embd = 128
block_size = 128
batch_size = 16
max_iters = 500
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
eval_interval = 250
eval_iters = 10
sample_tokens = 200
compile = False
