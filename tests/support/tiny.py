"""The tiny configuration: networks that train in milliseconds a step, on digits."""
VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4)
NETWORK = [f'model.{key}={value}' for key, value in VIT.items()] + ['model.drop_path=0.2']
# Of the command, over conf/base.yaml or conf/digits.yaml. What a test adds comes later and wins.
TINY = [*NETWORK, 'mask.patch_size=4', 'data.path=digits', 'data.val_fraction=0.1', 'train.batch_size=32',
        'train.length=60', 'optim.warmup=5', 'optim.milestones=[40]', 'validation.every=20', 'validation.images=16',
        'validation.pictures=2', 'checkpoint.every=5', 'log.every=3', 'runtime.threads=1', 'data.threads=2']
# Ten steps in which everything happens that must be the same however many processes share the work.
TEN_STEPS = [*TINY, 'train.length=10', 'optim.schedule=constant', 'optim.warmup=0', 'optim.base_lr=1e-2',
             'optim.clip_grad=0.5', 'validation.every=10', 'validation.images=51', 'checkpoint.every=10',
             'train.check_replicas=2', 'data.threads=1']
# Networks with maps over conf/base.yaml, with all that is random: scale, crop, flip, stochastic depth.
MAPS = ['model.type=swin', 'model.img_size=48', 'model.patch_size=4', 'model.embed_dim=8', 'model.depths=[1,1,1]',
        'model.num_heads=[1,1,2]', 'model.window_size=4', 'model.drop_path=0.2', 'model.head_channels=16',
        'data.path=digit-scenes-60x70', 'data.train_images=40', 'train.batch_size=12', 'optim.recipe=fixed',
        'optim.warmup=0', 'optim.schedule=constant', 'optim.clip_grad=0.5', 'validation.pictures=2', 'log.every=2',
        'train.check_replicas=2', 'runtime.threads=1', 'data.threads=1']
SEGMENTER = ['task=segment', *MAPS, 'data.val_fraction=0.01', 'train.length=8', 'optim.base_lr=2e-2',
             'validation.every=8', 'checkpoint.every=4']
# Also which boxes count is random. Rates are low, as what is proposed depends on the order of scores, where rounding
# sometimes decides.
DETECTOR = ['task=detect', *MAPS, 'model.anchor_scale=4', 'data.val_fraction=0.002', 'train.length=4',
            'optim.base_lr=5e-3', 'optim.eps=1e-5', 'validation.every=4', 'checkpoint.every=2']
