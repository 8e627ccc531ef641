# A small reflex GPT on the Python standard library's own sources: 1 to 3 minutes on two CPU cores, offline.
# python train.py config/quickstart.py
dataset = 'stdlib'
attention = 'reflex(4-2-2)'
n_layer = 4
n_embd = 128
block_size = 128
batch_size = 8
optimizer = 'muon'
learning_rate = 2e-2
lr_schedule = 'linear'
min_lr = 0.0
max_iters = 450
warmup_iters = 20
log_interval = 50
eval_interval = 150
eval_iters = 10
sample_tokens = 200
sample_start = 'def main('
compile = False
