"""A small DeepLabV3 with PiCo on generated scenes, as a configuration of mmsegmentation.

    python examples/mmseg_train.py examples/mmseg_pico_config.py --steps 40

mmsegmentation's own tools/train.py runs it too, with this folder on PYTHONPATH and the scenes that
`python examples/scenes.py runs/scenes --size 64` writes.
"""

# ruff: noqa: C408, for this is how configurations of mmsegmentation are written

custom_imports = dict(imports=["mmseg_pico"])
default_scope = "mmseg"
work_dir = "runs/mmseg"

classes = ("sky", "ground", "building", "bus", "car", "tree", "bush", "sign")
norm = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5] * 3,
        std=[127.5] * 3,
        seg_pad_val=255,
        size=(64, 64),
    ),
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        base_channels=16,
        stem_channels=16,
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg=norm,
    ),
    decode_head=dict(
        type="PiCoASPPHead",
        contrast=dict(
            type="PiCoLoss",
            embedding_dim=64,
            sampling="random",
            pixel_queue_size=200,
            region_queue_size=50,
        ),
        contrast_weight=0.1,
        in_channels=128,
        channels=64,
        dilations=(1, 3, 6),
        num_classes=len(classes),
        norm_cfg=norm,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    ),
    test_cfg=dict(mode="whole"),
)

images = dict(
    type="BaseSegDataset",
    data_root="runs/scenes",
    img_suffix=".png",
    seg_map_suffix=".png",
    metainfo=dict(classes=classes),
    pipeline=[{"type": step} for step in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")],
)
train_images = dict(data_prefix=dict(img_path="images/train", seg_map_path="labels/train"))
val_images = dict(data_prefix=dict(img_path="images/val", seg_map_path="labels/val"))
any_order = dict(type="InfiniteSampler", shuffle=True)
train_dataloader = dict(batch_size=8, sampler=any_order, dataset=dict(**images, **train_images))
in_order = dict(type="DefaultSampler", shuffle=False)
val_dataloader = dict(batch_size=8, sampler=in_order, dataset=dict(**images, **val_images))
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40, val_interval=1000)
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3))
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
