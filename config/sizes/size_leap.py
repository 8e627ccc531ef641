# A setting, to put behind any model: that of the published LEAP results, about 25 epochs of WikiText-2.
# python train.py config/leap.py config/sizes/size_leap.py --dataset=wikitext2   (twin: config/vanilla.py)
n_embd = 128
n_head = 4
n_layer = 6
block_size = 2048
batch_size = 2
dropout = 0.1
max_iters = 15000
learning_rate = 5e-4
lr_schedule = 'linear'
warmup_iters = 0
min_lr = 0.0
beta2 = 0.999
weight_decay = 0.01
eval_interval = 600
eval_iters = 0
