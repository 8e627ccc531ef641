# The instruction model: reflex over all layers, RMSNorm, SwiGLU, from the GPT-2-shaped Russian GPT-3 large.
# python data/russian_instructions/prepare.py && python train.py config/recipes/rugpt_reflex.py
# python sample.py --out_dir=out/rugpt_reflex --template='{start}\n' --stop=eot --start='Что такое снег?'
init_from = 'ai-forever/rugpt3large_based_on_gpt2'
dataset = 'russian_instructions'
attention = 'reflex_all'
norm = 'rmsnorm'
mlp = 'swiglu'
n_layer = 6
n_head = 8
n_embd = 1536
block_size = 2048
dropout = 0.1
bias = True
batch_size = 8
gradient_accumulation_steps = 2
