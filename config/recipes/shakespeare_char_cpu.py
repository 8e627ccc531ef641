# Characters of Shakespeare on a CPU: nanoGPT's recipe (its README), but Muon in the blocks, a quarter of the
# steps, and rates for that: AdamW's 2e-2 for 1e-3, linear to 0 for cosine to 1e-4, 10 warm-up steps.
# python data/shakespeare_char/prepare.py && python train.py config/recipes/shakespeare_char_cpu.py
dataset = 'shakespeare_char'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
optimizer = 'muon'
learning_rate = 2e-2
muon_learning_rate = 1e-2
beta2 = 0.99
max_iters = 500
warmup_iters = 10
lr_schedule = 'linear'
min_lr = 0.0
eval_interval = 50
eval_iters = 50
sample_tokens = 300
compile = False
threads = 1
