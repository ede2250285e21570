"""What `pretrain` does on each rank: the loop, its engines, checkpoints and blocks, and the loss that it minimises.

Ray Train's part is in `ifguide.stages.pretrain`. `signed_loss` is the loss for other programs' loops.
"""
