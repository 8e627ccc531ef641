# A control for bank at the size size_cpu, with a vocabulary of 4096: the parameters of its two tables, spent
# on wider MLPs.
# python train.py config/plans/wide_cpu.py config/sizes/size_cpu.py --dataset=stdlib
mlp_hidden = 1194
