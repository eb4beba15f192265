"""What people write who come from other programs, and what it is called here.

Nothing is guessed silently: the answer to a foreign name is an error that says our key with the value that was given.
"""
import difflib
import re
import shlex
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple


def _same(value: str) -> str:
    return value


def _epochs(value: str) -> str:
    return f'{value} epochs' if re.fullmatch(r'[\d.]+', value) else value


def _each_epochs(value: str) -> str:
    return '[' + ', '.join(_epochs(part) for part in re.findall(r'[\w.]+', value)) + ']'


def _gpus(value: str) -> str:
    """Devices from 0,1 or cuda:0."""
    numbers = re.findall(r'\d+', value)
    return '[' + ','.join(f'gpu({number})' for number in numbers) + ']' if numbers else value


def _on(value: str) -> str:
    return 'float32' if value.lower() in ('false', '0', 'off', 'none', 'float32', 'o0') else 'bf16'


def _list(value: str) -> str:
    return '[' + ', '.join(re.findall(r'[^\s,\[\]()]+', value)) + ']'


def _mean(value: str) -> str:
    """The strength of timm's rand-m9-mstd0.5-inc1."""
    found = re.search(r'-m([\d.]+)', value)
    return found[1] if found else value


RATE = 'the rate for 512 images a step; it scales with train.batch_size'
BATCH = 'images a step over all workers and devices, not of each'
STEPS = 'in steps'
# Our key, how a value is converted, what differs, and what other programs call it: SimMIM's and Swin's own code, timm,
# MAE and BEiT, mmpretrain, mmdetection, detectron2, GluonCV, PyTorch Lightning, Hugging Face. Lower case, _ for -; a
# name without a section holds in every section.
TABLE: Tuple[Tuple[str, Callable[[str], str], str, str], ...] = (
    ('optim.base_lr', _same, RATE, 'lr blr learning_rate max_lr peak_lr initial_lr init_lr lr_base lr0'),
    ('optim.warmup_lr', _same, RATE, 'warmup_lr_init warmup_start_lr warmup_init_lr'),
    ('optim.min_lr', _same, RATE, 'eta_min lr_min end_lr final_lr lr_end min_learning_rate'),
    ('train.batch_size', _same, BATCH,
     'b bs batch batch_size_per_gpu per_device_train_batch_size samples_per_gpu batch_per_gpu imgs_per_gpu '
     'ims_per_batch'),
    ('train.length', _epochs, '', 'epochs num_epochs epoch max_epochs n_epochs num_train_epochs nb_epochs total_epochs '
     'train_epochs'),
    ('train.length', _same, STEPS, 'max_steps steps num_steps total_steps iterations max_iters max_iter iters niter'),
    ('optim.warmup', _epochs, '', 'warmup_epochs warmup_epoch warm_epochs num_warmup_epochs'),
    ('optim.warmup', _same, STEPS, 'warmup_steps warmup_iters warmup_iterations num_warmup_steps'),
    ('optim.weight_decay', _same, '', 'wd decay w_d l2'),
    ('optim.clip_grad', _same, '', 'clip grad_clip gradient_clip gradient_clip_val max_grad_norm max_norm '
     'clip_grad_norm clip_gradient'),
    ('optim.betas', _list, '', 'opt_betas'), ('optim.eps', _same, '', 'opt_eps adam_epsilon epsilon'),
    ('optim.type', str.lower, '', 'opt optimizer optim trainer optimizer_type optimizer.name'),
    ('optim.schedule', str.lower, '', 'sched scheduler lr_scheduler lr_mode lr_schedule lr_scheduler_type lr_policy '
     'lr_scheduler.name'),
    ('optim.milestones', _each_epochs, '', 'multisteps decay_epochs lr_decay_epoch lr_steps lr_step decay_milestones'),
    ('optim.gamma', _same, '', 'lr_decay decay_rate lr_gamma'),
    ('optim.layer_decay', _same, '', 'layer_decay_rate lr_layer_decay llrd layer_wise_decay'),
    ('data.path', _same, '', 'data data_path data_dir dataset train_dir data_root root train_path rec_train '
     'dataset_dir train_data data.train'),
    ('data.val_path', _same, '', 'val_dir val_data eval_data valid_dir rec_val val_data_path eval_data_path data.val'),
    ('data.labels', _same, '', 'ann_file ann_path annotation_file annotations json_file train_annotations'),
    ('data.val_labels', _same, '', 'val_ann_file val_annotations'),
    ('data.val_fraction', _same, '', 'val_split validation_split val_ratio'),
    ('data.threads', _same, 'threads that decode, of each process', 'num_workers workers j nworkers num_data_workers '
     'dataloader_num_workers workers_per_gpu preprocessing_num_workers'),
    ('data.prefetch', _same, '', 'prefetch_factor prefetch_batches'),
    ('data.flip', _same, '', 'hflip horizontal_flip'), ('data.crop_scale', _list, '', 'rrc_scale'),
    ('data.scale_jitter', _list, '', 'ratio_range scale_range resize_range'),
    ('data.crop_ratio', _list, '', 'rrc_ratio aspect_ratio'), ('data.eval_crop', _same, '', 'crop_pct crop_ratio_test'),
    ('data.interpolation', _same, '', 'train_interpolation'),
    ('output', _same, '', 'o output_dir out_dir out work_dir save_dir outdir log_dir default_root_dir logdir'),
    ('name', _same, '', 'tag exp_name experiment run_name exp experiment_name model.name'),
    ('resume', _same, '', 'r resume_from resume_from_checkpoint ckpt_path resume_path auto_resume resume_states'),
    ('model.pretrained', _same, '', 'finetune init_checkpoint pretrained_checkpoint load_from checkpoint '
     'initial_checkpoint pretrained_path weights'),
    ('seed', _same, '', 'random_seed manual_seed'),
    ('devices', _gpus, '', 'gpus gpu gpu_ids gpu_id device device_ids num_gpus ngpus cuda'),
    ('runtime.precision', _on, '', 'amp fp16 bf16 use_amp amp_enable native_amp apex_amp amp_opt_level enable_amp '
     'dtype mixed_precision half'),
    ('model.img_size', _same, '', 'image_size input_size img_sz imgsz resolution crop_size input_shape'),
    ('model.patch_size', _same, '', 'vit.patch_size swin.patch_size swinv2.patch_size'),
    ('model.drop_path', _same, '', 'drop_path_rate stochastic_depth'),
    ('model.init_values', _same, '', 'layer_scale_init_value init_scale layerscale'),
    ('model.init_std', _same, '', 'initializer_range'),
    ('model.norm_targets', _same, '', 'norm_pix_loss norm_target norm_target.enable'),
    ('model.norm_window', _same, '', 'norm_target.patch_size'),
    ('model.masks', str.lower, '', 'mask_on with_mask use_mask'),
    ('model.recompute', _same, '', 'use_checkpoint grad_checkpointing gradient_checkpointing activation_checkpointing'),
    ('model.depth', _same, '', 'num_layers n_layers num_hidden_layers'),
    ('model.embed_dim', _same, '', 'hidden_size dim width embed_dims'),
    ('model.num_heads', _same, '', 'heads n_heads num_attention_heads'),
    ('mask.ratio', _same, '', 'mask_ratio masking_ratio mask_prob'),
    ('mask.patch_size', _same, '', 'mask_patch_size mask_unit_size'),
    ('augment.rand_magnitude', _mean, '', 'aa auto_augment'),
    ('augment.rand_ops', _same, '', 'num_ops ra_n'),
    ('augment.erasing', _same, '', 'reprob random_erasing random_erase'),
    ('augment.mixup', _same, '', 'mixup_alpha'), ('augment.cutmix', _same, '', 'cutmix_alpha'),
    ('augment.mix_switch', _same, '', 'mixup_switch_prob'), ('augment.mix_prob', _same, '', 'mixup_prob'),
    ('augment.smoothing', _same, '', 'label_smoothing label_smooth ls'),
    ('train.accumulate', _same, '', 'accumulation_steps accum_iter grad_accum_steps gradient_accumulation_steps '
     'accumulate_grad_batches update_freq accum accum_steps grad_accum'),
    ('train.ema', _same, '', 'model_ema_decay ema_decay model_ema'),
    ('train.store', _same, '', 'kvstore kv_store'), ('train.stop_early', _same, 'in validations', 'early_stopping'),
    ('validation.every', _epochs, '', 'val_interval eval_interval val_freq eval_freq eval_every '
     'check_val_every_n_epoch'),
    ('validation.flip', str.lower, '', 'tta flip_test test_flip test_time_flip'),
    ('checkpoint.every', _epochs, '', 'save_freq save_interval save_frequency save_every save_ckpt_freq save_period '
     'checkpoint.interval'),
    ('checkpoint.keep', _same, '', 'max_keep_ckpts checkpoint_hist save_total_limit save_top_k'),
    ('log.every', _same, STEPS, 'print_freq log_interval log_freq log_every_n_steps logging_steps print_every'),
)
FOREIGN: Dict[str, Tuple[str, Callable[[str], str], str]] = {
    name: row[:3] for row in TABLE for name in row[3].split()}
# What no key stands for: the whole answer.
ELSEWHERE = {
    **dict.fromkeys('cfg config config_file configs conf'.split(), 'the configuration file stands first, as in: '
                    'mxsimmim pretrain conf/vit_base.yaml'),
    **dict.fromkeys('local_rank world_size dist_url dist_backend rank nproc_per_node nnodes launcher distributed '
                    'multiprocessing_distributed master_addr master_port dist_on_itp sync_bn'.split(),
                    'several processes are started by tools/launch.py: tools/launch.py -n 4 -- mxsimmim pretrain …'),
    **dict.fromkeys('model model_name arch backbone'.split(), 'the models are recipes, conf/vit_base.yaml and others, '
                    'and the keys of model.*'),
    **dict.fromkeys('num_classes nb_classes n_classes'.split(), 'classes are counted in the data'),
    **dict.fromkeys('evaluate test_only validate eval_only'.split(), 'write --eval, after mxsimmim finetune'),
    **dict.fromkeys('nms_thresh nms_threshold iou_thres iou_threshold score_thresh score_thr conf_thres max_per_img'
                    .split(), 'objects are found from a score of 0.05 on, 100 an image, and of a class those that '
                    'share half of their area or less'),
    **dict.fromkeys('dry_run sanity_check smoke_test'.split(), 'write --check'),
    **dict.fromkeys('momentum nesterov dropout drop drop_rate attn_drop_rate color_jitter pin_mem pin_memory '
                    'channels_last compile torchcompile throughput wandb'.split(), 'there is nothing like it here'),
}


class Meant(NamedTuple):
    """One of our keys, the value as it is written here, and what is different about it."""
    key: str
    value: str
    note: str = ''


def meanings(key: str, value: str, known: Sequence[str]) -> List[Meant]:
    """What somebody may have meant by a key that is none of the `known` ones; empty where nobody can tell.

    Our own names come first: in another spelling, without their section or in a wrong one; then other programs'.
    """
    plain = key.strip().lstrip('-').replace('-', '_').lower()
    leaves = _leaves(known)
    own = [name for name in leaves if plain in (name, name.replace('.', '_'))]
    parts = plain.split('.')
    for start in range(len(parts)):
        tail = '.'.join(parts[start:])
        own = own or ([] if tail in FOREIGN and start < len(parts) - 1 else
                      [name for name in leaves if name == tail or name.endswith('.' + tail)])
        if not own and tail in FOREIGN:
            ours, convert, note = FOREIGN[tail]
            return [Meant(ours, convert(value), note)]
    return [Meant(name, value, BATCH if name == 'train.batch_size' != plain else '') for name in own]


def _leaves(known: Sequence[str]) -> List[str]:
    sections = {name.rpartition('.')[0] for name in known}
    return [name for name in known if name not in sections]


def answer(key: str, value: Any, known: Sequence[str], in_file: bool = False) -> str:
    """What to write instead of a key that is none of the `known` ones; empty where nobody can tell.

    Args:
        value: what was given for it; None where nothing was.
        in_file: whether the answer is for a YAML file, not for the command line.
    """
    text = 'VALUE' if value is None else _written(value)
    found = meanings(key, text, known)
    if not found:
        return ELSEWHERE.get(key.strip().lstrip('-').replace('-', '_').lower().rpartition('.')[2], '')
    notes = ''.join(f' ({note})' for note in dict.fromkeys(meant.note for meant in found) if note)
    return 'write ' + ' or '.join(_form(meant, in_file) for meant in found) + notes


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return {True: 'true', False: 'false'}[value] if isinstance(value, bool) else str(value)


def _form(meant: Meant, in_file: bool) -> str:
    if not in_file:
        return f'{meant.key}={shlex.quote(meant.value)}'
    *section, leaf = meant.key.split('.')
    return f'{section[0]}: {{{leaf}: {meant.value}}}' if section else f'{leaf}: {meant.value}'


def nearest(key: str, known: Sequence[str]) -> str:
    """The known key whose last part is most like the unknown one's, the same section first; empty if none is."""
    section, _, leaf = key.rpartition('.')
    for candidates in ([name for name in known if name.rpartition('.')[0] == section], known):
        leaves = {name.rpartition('.')[2]: name for name in candidates}
        near = difflib.get_close_matches(leaf, list(leaves), 1, 0.6)
        if near:
            return leaves[near[0]]
    return ''


def no_pair(words: Sequence[str], place: int, known: Sequence[str]) -> str:
    """What to write instead of ``words[place]``, which is not key=value but, say, ``key: value`` or ``key = value``.

    Empty where nobody can tell.
    """
    word, later = words[place], list(words[place + 1:])
    if place and words[place - 1].endswith('='):  # key= value
        return pair(words[place - 1][:-1], word, known)
    if word.endswith(('.yaml', '.yml')):
        return f"one configuration file at a time: 'base: {word}' in the other one inherits from it"
    found = re.fullmatch(r'([\w.-]+)(?:\s*:\s*|\s+)(\S.*)', word)
    if found:
        return pair(found[1], found[2], known)
    key = word.rstrip(':')
    if later and later[0].startswith('='):
        later[:1] = [later[0][1:]] * (later[0] != '=')
        return pair(key, later[0] if later else None, known)
    if later and '=' not in later[0] and not later[0].startswith('--'):
        return pair(key, later[0], known)
    return ''


def pair(key: str, value: Optional[str], known: Sequence[str]) -> str:
    """The way to write a key and its value, whether the key is ours or not; empty where nobody can tell."""
    if key in _leaves(known):
        return f'write {_form(Meant(key, "VALUE" if value is None else value), False)}'
    return answer(key, value, known)


def options(words: Sequence[str], has: Sequence[str], known: Sequence[str]) -> List[str]:
    """A line for each word that is an option, but none that the command `has`: what to write instead."""
    lines = []
    place = 0
    while place < len(words):
        word, place = words[place], place + 1
        name, equals, value = word.partition('=')
        if not re.match(r'--?[A-Za-z]', word) or name in has:
            continue
        given: Optional[str] = value if equals else None
        if given is None and place < len(words) and not words[place].startswith('--') and '=' not in words[place]:
            given, place = words[place], place + 1
        if name == '--opts':
            place -= given is not None
            pairs = [word for word in words[place:] if not word.startswith('-')]
            hints = [pair(key, value, known)[len('write '):] for key, value in zip(pairs[::2], pairs[1::2])]
            lines.append(f"'--opts' is not needed here: write KEY=VALUE{', here ' * bool(any(hints))}"
                         + ' '.join(filter(None, hints)))
            break
        plain = name.lstrip('-').replace('-', '_').lower()
        if given is None and plain in FOREIGN and FOREIGN[plain][0] == 'runtime.precision':
            given = 'true'
        short = not name.startswith('--') and len(name) > 2 and not equals  # -j8
        advice = pair(plain, given, known) or (pair(name[1], name[2:], known) if short else '')
        near = nearest(plain, known)
        lines.append(f"no option '{name}': " + (advice or 'keys are given as key=value' + (
            f" (did you mean '{near}'?)" if near else ', and `mxsimmim config` lists them')))
    return lines
