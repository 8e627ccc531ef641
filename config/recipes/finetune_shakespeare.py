# GPT-2 on Shakespeare, in its own shape: what is not said here is the checkpoint's.
# python data/shakespeare/prepare.py && python train.py config/recipes/finetune_shakespeare.py
# A larger one: --init_from=gpt2-medium, gpt2-large, gpt2-xl, or a folder.
init_from = 'gpt2'
dataset = 'shakespeare'
dropout = 0.1
batch_size = 1
gradient_accumulation_steps = 32
learning_rate = 3e-5
decay_lr = False
max_iters = 100
eval_interval = 20
eval_iters = 40
compile = False
