"""160,000 steps of AdamW on ADE20K, sixteen crops each; the learning rate falls linearly to zero."""

# "mmseg::" would look for a distribution called mmsegmentation, which OneDL's fork is not; a path finds both.
_base_ = [
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/schedules/schedule_160k.py",
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/default_runtime.py",
]

custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="PublishedDecayConstructor",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160_000),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
