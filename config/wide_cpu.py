# A control for config/bank.py at the size of config/size_cpu.py with a vocabulary of 4096: the parameters of
# its two tables, spent on wider MLPs.
# python train.py config/wide_cpu.py config/size_cpu.py --dataset=stdlib
mlp_hidden = 1194
