"""ADE20K (150 classes), in the folder named by the environment variable ADE20K_ROOT.

Training: the image at 2048x512 times 0.5 to 2, a crop of 512x512 no class fills by more than 3/4, flip, photometric
distortion. Test: the whole image at 2048x512. With --tta: at 0.5 to 1.75 of that, each also flipped.
"""

# "mmseg::" would look for a distribution called mmsegmentation, which OneDL's fork is not; a path finds both.
_base_ = [
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/datasets/ade20k.py",
]

data_root = "{{$ADE20K_ROOT:data/ade/ADEChallengeData2016}}"

train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))  # per process, of eight
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
