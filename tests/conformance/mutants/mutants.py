"""Bugs of real training scripts, each planted into a copy of a script and common/ by replacing text.

`caught_by` names the check that must fail; `--matrix` says what else does."""

from dataclasses import dataclass

SCRIPT, DATA, TRAINING = "scripts/train_quantumgrav.py", "common/data.py", "common/training.py"
CHECKPOINTS, LOGS, CLI, QUANTIZERS = "common/checkpoints.py", "common/logs.py", "common/cli.py", "common/quantizers.py"
STUDENT, ULTIMATE, VQGAN = (f"scripts/train_{name}.py" for name in ("student", "ultimate", "vqgan"))

SPLIT = "training_does_not_depend_on_the_split_of_the_batch"
RATE = "the_learning_rate_does_not_depend_on_the_split_of_the_batch"
EVALUATION = "evaluation_does_not_depend_on_the_number_of_processes"
SAMPLES = "every_sample_comes_once_per_epoch"
REPLICAS = "all_ranks_hold_the_same_weights_after_every_step"
WRITER = "only_one_rank_writes"
TERMS = "no_loss_term_is_constant"
GRADIENTS = "every_trained_parameter_gets_a_gradient"
AVERAGES = "the_averaged_weights_follow_all_weights"
WORKERS = "loader_workers_change_nothing"
EARLY = "early_stopping_is_one_decision"
RESUME = "a_run_killed_in_mid_epoch_resumes_exactly"
TORN = "a_run_killed_while_it_saves_resumes_exactly"
SIGTERM = "sigterm_saves_and_ends_on_all_ranks"
OTHER_WORLD = "a_run_continues_on_another_number_of_processes"
DAMAGED = "a_damaged_checkpoint_is_passed_over"
HOSTILE = "a_hostile_checkpoint_runs_no_code"
NAN = "a_nan_on_one_rank_harms_no_weight_and_stops_no_rank"
STOPPED = "a_stopped_run_resumes_exactly_on_two_processes"
DEAD = "when_one_rank_dies_the_others_end_and_the_run_can_go_on"
PHASE = "a_run_killed_where_a_phase_begins_resumes_exactly"
LAUNCHER = "the_launcher_changes_nothing"
WANDB = "a_wandb_run_offline_is_complete"


@dataclass(frozen=True)
class Mutant:
    bug: str
    caught_by: str
    edits: tuple[tuple[str, str, str], ...]
    """(file, text that stands there once, text in its place)"""
    job: str = "quantumgrav"


REPLICA_CHECK = 'training.check_replicas(accelerator, raw, f"after step {step}")'
STEPS = "steps = data.StepLoader(data.make_loader(train_set, sampler, config, collate), accelerator)"
UNIQUE = (DATA, "if unique != size or len(order) != size:", "if False:")  # our own alarm would go off first

MUTANTS = (
    Mutant(
        "loss is a mean over each rank's own labels",
        SPLIT,
        (
            (
                SCRIPT,
                "counts = train_set.counts(sampler.global_batch(step))",
                "rank, ranks = accelerator.process_index, accelerator.num_processes\n"
                "        own = np.concatenate(sampler.micro_batches(step)[rank::ranks])\n"
                "        counts = {task: ranks * count for task, count in train_set.counts(own).items()}",
            ),
        ),
    ),
    Mutant(
        "loss divided by the accumulation twice",
        SPLIT,
        ((SCRIPT, "loss * sampler.parts)", "loss * accelerator.num_processes)"),),
    ),
    Mutant(
        "zero_grad before each backward",
        SPLIT,
        (
            (
                SCRIPT,
                "accelerator.backward(loss * sampler.parts)",
                "optimizer.zero_grad(); accelerator.backward(loss * sampler.parts)",
            ),
        ),
    ),
    Mutant(
        "training loss of rank 0 is logged",
        SPLIT,
        ((TRAINING, 'accelerator.reduce(values, "sum").tolist()', "(values * accelerator.num_processes).tolist()"),),
    ),
    Mutant(
        "the split depends on the rank",
        SAMPLES,
        (
            (
                SCRIPT,
                "default_rng([config.seed, 0x5EED])",
                'default_rng([config.seed, __import__("common.cli").cli.rank()])',
            ),
            UNIQUE,
        ),
    ),
    Mutant(
        "every rank sees the same samples",
        SAMPLES,
        ((DATA, "self.micro_batches(step)[self.rank :: self.processes]", "self.micro_batches(step)[0 :: self.processes]"),),
    ),
    Mutant(
        "dealt by the sampler and again by prepare",
        SAMPLES,
        (
            (
                SCRIPT,
                STEPS,
                "loader = data.make_loader(train_set, sampler, config, collate); loader._is_accelerate_prepared = False;"
                " sampler.batch_size, sampler.drop_last = config.batch_size, True;"
                " steps = data.StepLoader(accelerator.prepare(loader), accelerator)",
            ),
            (DATA, "loader.batch_sampler.accumulation, 0.0", "accelerator.gradient_accumulation_steps, 0.0"),
            (
                DATA,
                "[next(self.batches) for _ in range(self.accumulation)]",
                "[self._next() for _ in range(self.accumulation)]",
            ),
            (
                DATA,
                "    def __next__(self) -> list:",
                "    def _next(self):\n        for batch in self.batches:\n            self.last = batch\n"
                "            break\n        return self.last\n\n    def __next__(self) -> list:",
            ),
        ),
    ),
    Mutant(
        "set_epoch forgotten",
        SAMPLES,
        ((DATA, "default_rng([self.seed, self.first_epoch + epoch])", "default_rng([self.seed, self.first_epoch])"),),
    ),
    Mutant(
        "metrics of rank 0's shard",
        EVALUATION,
        ((DATA, "gather_object([mine]) if accelerator.num_processes > 1 else [mine]", "[mine]"), UNIQUE),
    ),
    Mutant(
        "validation padding counted twice",
        EVALUATION,
        (
            (
                DATA,
                "        every = [order[i :",
                "        whole = batch_size * accelerator.num_processes\n"
                "        order = np.resize(order, -(-size // whole) * whole) if accelerator.num_processes > 1 else order\n"
                "        every = [order[i :",
            ),
            (DATA, "for i in range(0, size, batch_size)]", "for i in range(0, len(order), batch_size)]"),
            UNIQUE,
        ),
    ),
    Mutant(
        "mean of unequal batch means",
        EVALUATION,
        (
            (
                SCRIPT,
                'row = {"id": batch["id"], "size": batch["sizes"]}',
                'row = {"id": batch["id"], "size": batch["sizes"], "batch": torch.full_like(batch["id"], batch["id"][0])}',
            ),
            (
                SCRIPT,
                'values[f"{task}/loss"] = loss.mean()',
                'batch = table["batch"][known]\n'
                '        values[f"{task}/loss"] = float(np.mean([loss[batch == b].mean() for b in np.unique(batch)]))',
            ),
        ),
    ),
    Mutant(
        "scheduler stepped once per process",
        RATE,
        ((SCRIPT, "training.cosine(step, ", "training.cosine(step * accelerator.num_processes, "),),
    ),
    Mutant(
        "layers thawed after prepare",
        REPLICAS,
        (
            (
                SCRIPT,
                "model, optimizer = accelerator.prepare(model, optimizer)",
                "model.heads.requires_grad_(False)\n    model, optimizer = accelerator.prepare(model, optimizer)\n"
                "    accelerator.unwrap_model(model).heads.requires_grad_(True)",
            ),
            (SCRIPT, REPLICA_CHECK, "pass"),
        ),
    ),
    Mutant(
        "forward pass through the unwrapped model",
        REPLICAS,
        (
            (SCRIPT, "terms = tasks.losses(model(batch), batch)", "terms = tasks.losses(raw(batch), batch)"),
            (SCRIPT, REPLICA_CHECK, "pass"),
        ),
    ),
    Mutant(
        "every rank writes the log",
        WRITER,
        ((LOGS, "self.active = accelerator.is_main_process", "self.active = True"),),
    ),
    Mutant(
        "every rank exports the model",
        WRITER,
        (
            (
                CHECKPOINTS,
                '        if self.accelerator.is_main_process:\n            target = self.path / "model"',
                '        if True:\n            target = self.path / "model"',
            ),
            (CHECKPOINTS, 'temporary = target / ".model.safetensors.tmp"', 'temporary = target / "model.safetensors"'),
        ),
    ),
    Mutant(
        "a loss term that is always 0",
        TERMS,
        ((SCRIPT, "loss = F.mse_loss(", "loss = 0 * F.mse_loss("),),
    ),
    Mutant(
        "a loss term without a gradient",
        GRADIENTS,
        (
            (
                SCRIPT,
                'F.mse_loss(outputs[task][:, 0], target, reduction="none")',
                'F.mse_loss(outputs[task][:, 0].detach(), target, reduction="none") + 0 * outputs[task][:, 0]',
            ),
        ),
    ),
    Mutant(
        "zero_grad between backward and step",
        GRADIENTS,
        (
            (
                SCRIPT,
                "verdict = training.agree(accelerator, totals, norm)",
                "verdict = training.agree(accelerator, totals, norm); optimizer.zero_grad(set_to_none=False)",
            ),
        ),
    ),
    Mutant(
        "the average misses the last layers",
        AVERAGES,
        (
            (
                TRAINING,
                "torch._foreach_lerp_(*map(standing, zip(*self.averaged, strict=True)), 1 - decay)",
                "torch._foreach_lerp_(*map(standing, zip(*self.averaged[:-2], strict=True)), 1 - decay)",
            ),
        ),
    ),
    Mutant(
        "augmentation seeded by the worker",
        WORKERS,
        (
            (
                SCRIPT,
                "rng = np.random.default_rng([self.config.seed, sample, 0 if epoch is None else epoch + 1])",
                "worker = torch.utils.data.get_worker_info()\n"
                "        rng = np.random.default_rng([worker.id if worker else 9, sample, 0 if epoch is None else epoch])",
            ),
        ),
    ),
    Mutant(
        "augmentation from the process's global generator",
        RESUME,
        (
            (
                SCRIPT,
                "rng = np.random.default_rng([self.config.seed, sample, 0 if epoch is None else epoch + 1])",
                "rng = np.random.default_rng(np.random.randint(1 << 30))",
            ),
            (
                SCRIPT,
                "    accelerator = launch.start(config)",
                "    accelerator = launch.start(config)\n    np.random.seed(0)",
            ),
        ),
    ),
    Mutant(
        "early stop on rank 0 alone",
        EARLY,
        (
            (
                TRAINING,
                "return better, self.patience > 0 and self.left <= 0",
                "return better, accelerator.is_main_process and self.patience > 0 and self.left <= 0",
            ),
        ),
    ),
    Mutant(
        "save on rank 0 alone",
        SPLIT,
        (
            (
                SCRIPT,
                "            folder.save(state, modules",
                "            if accelerator.is_main_process:\n                folder.save(state, modules",
            ),
        ),
    ),
    Mutant(
        "weights without the optimizer",
        RESUME,
        ((SCRIPT, '{"optimizer": optimizer}', "{}"),),
    ),
    Mutant(
        "resume starts again",
        RESUME,
        ((SCRIPT, "        state = found\n", '        state = found | {"step": 0, "evaluated": 0}\n'),),
    ),
    Mutant(
        "resume goes back to the epoch's first sample",
        RESUME,
        (
            (
                SCRIPT,
                'step = sampler.start = state["step"]',
                'step = state["step"]\n    sampler.start = step // sampler.steps_per_epoch * sampler.steps_per_epoch',
            ),
        ),
    ),
    Mutant(
        "the average starts afresh on resume",
        RESUME,
        ((SCRIPT, "        state = found\n", "        state = found\n        ema = training.EMA(raw, config.ema_decay)\n"),),
    ),
    Mutant(
        "rows past the checkpoint stay in the log",
        RESUME,
        (
            (
                LOGS,
                'row for row in read_rows(path) if row["step"] <= step and step > 0',
                "row for row in read_rows(path) if True",
            ),
        ),
    ),
    Mutant(
        "checkpoints written in place and not verified",
        TORN,
        (
            (CHECKPOINTS, 'self.root / name, self.root / f".{name}.tmp"', "self.root / name, self.root / name"),
            (CHECKPOINTS, "        if final.exists():  # saved", "        if False:  # saved"),
            (CHECKPOINTS, "if why := damage(directory):", "if why := None:"),
        ),
    ),
    Mutant(
        "checkpoints are not verified",
        DAMAGED,
        ((CHECKPOINTS, "if why := damage(directory):", "if why := None:"),),
    ),
    Mutant(
        "optimizer state loaded by pickle",
        HOSTILE,
        ((CHECKPOINTS, 'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'),),
    ),
    Mutant(
        "SIGTERM is not heard",
        SIGTERM,
        ((SCRIPT, "stopping = verdict.stop", "stopping = False"),),
    ),
    Mutant(
        "SIGTERM ends the rank that got it",
        SIGTERM,
        ((SCRIPT, "stopping = verdict.stop", "stopping = launch.stop_requested()"),),
    ),
    Mutant(
        "no checkpoint on SIGTERM",
        SIGTERM,
        ((SCRIPT, "or last or stopping or better", "or last or better"),),
    ),
    Mutant(
        "no guard against NaN",
        NAN,
        ((SCRIPT, "finite = guard.passes(verdict, step + 1)", "finite = True"),),
    ),
    Mutant(
        "NaN skipped on its own rank",
        NAN,
        (
            (
                SCRIPT,
                "accelerator.backward(loss * sampler.parts)",
                "if loss.isfinite(): accelerator.backward(loss * sampler.parts)",
            ),
        ),
    ),
    Mutant(
        "the order depends on Python's hash of a string",
        LAUNCHER,
        (
            (
                DATA,
                "default_rng([self.seed, self.first_epoch + epoch])",
                'default_rng([self.seed, self.first_epoch + epoch, abs(hash("order"))])',
            ),
        ),
    ),
    Mutant(
        "the order depends on the number of processes",
        OTHER_WORLD,
        (
            (
                DATA,
                "default_rng([self.seed, self.first_epoch + epoch])",
                "default_rng([self.seed, self.first_epoch + epoch, self.processes])",
            ),
        ),
    ),
    Mutant(
        "a lost process counts as success",
        DEAD,
        ((CLI, "os._exit(code)  #", "os._exit(0)  #"),),
    ),
    Mutant(
        "the optimizer is loaded on rank 0 alone",
        STOPPED,
        (
            (
                CHECKPOINTS,
                "target.load_state_dict(content[kind][name])",
                'if kind == "modules" or self.accelerator.is_main_process:\n'
                "                        target.load_state_dict(content[kind][name])",
            ),
            (SCRIPT, REPLICA_CHECK, "pass"),
        ),
    ),
    Mutant(
        "evaluation is not sent to the tracker",
        WANDB,
        (
            (
                LOGS,
                'self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])',
                'self.accelerator.log({k: v for k, v in row.items() if k.startswith("train/")}, step=row["step"])',
            ),
        ),
    ),
    # -- of the other scripts
    Mutant(
        "layers thawed after the wrap",
        REPLICAS,
        (
            (
                ULTIMATE,
                "            model = training.rewrap(accelerator, model)\n",
                "            model = training.rewrap(accelerator, model) if steps is None else model\n",
            ),
            (ULTIMATE, 'training.check_replicas(accelerator, raw, f"at step {step}, stage {phase.stage}")', "pass"),
            (ULTIMATE, REPLICA_CHECK, "pass"),
        ),
        "ultimate",
    ),
    Mutant(
        "the average misses what thaws later",
        AVERAGES,
        (
            (
                TRAINING,
                "pairs = list(zip(places(self.module), places(model), strict=True))",
                "pairs = list(zip(*(sum((places(part) for name, part in m.named_children() if name != 'backbone'), [])"
                " for m in (self.module, model)), strict=True))",
            ),
        ),
        "ultimate",
    ),
    Mutant(
        "a resumed run begins with a frozen backbone",
        PHASE,
        (
            (
                ULTIMATE,
                "thaw(raw.backbone, phase.thawed)",
                "thaw(raw.backbone, phase.thawed if steps is not None else 0)",
            ),
        ),
        "ultimate",
    ),
    Mutant(
        "masks not resized with the images",
        SPLIT,
        (
            (
                ULTIMATE,
                "return image, (upsample(mask[:, None], (size, size))[:, 0] > 0.5).float()",
                "return image, mask",
            ),
        ),
        "ultimate",
    ),
    Mutant(
        "each rank balances its own experts",
        SPLIT,
        (
            (
                ULTIMATE,
                'means = ([verdict.terms[f"{kind}/{key}/{i}"] for i in range(experts)]',
                'means = ([float(totals[f"{kind}/{key}/{i}"]) * accelerator.num_processes for i in range(experts)]',
            ),
        ),
        "ultimate",
    ),
    Mutant(
        "the codebook starts again on resume",
        RESUME,
        (
            (
                VQGAN,
                "    elif not config.init_from:\n        start_codebook",
                "    if not config.init_from:\n        start_codebook",
            ),
        ),
        "vqgan",
    ),
    Mutant(
        "each rank has a codebook of its own",
        SPLIT,
        ((QUANTIZERS, 'accelerator.reduce(self._collected, "sum")', "self._collected"),),
        "vqgan",
    ),
    Mutant(
        "two accumulate contexts",
        SPLIT,
        (
            (
                VQGAN,
                "with accelerator.accumulate(model, disc):",
                "with accelerator.accumulate(model), accelerator.accumulate(disc):",
            ),
        ),
        "vqgan",
    ),
    Mutant(
        "discriminators are never called",
        GRADIENTS,
        ((VQGAN, "if judging:\n                    judged,", "if False:\n                    judged,"),),
        "vqgan",
    ),
    Mutant(
        "the loss is summed over the batch instead of the channels",
        SPLIT,
        (
            (
                VQGAN,
                "(output.reconstruction - target).abs().flatten(1).mean(1)}",
                "sum((a - b).abs().mean() for a, b in zip(output.reconstruction, target)).expand(len(target))}",
            ),
        ),
        "vqgan",
    ),
    Mutant(
        "crops repeat in each worker",
        WORKERS,
        (
            (
                STUDENT,
                "rng = np.random.default_rng([self.config.seed, index, epoch])",
                "worker = torch.utils.data.get_worker_info()\n"
                "        rng = np.random.default_rng([self.config.seed, worker.id if worker else 0, epoch])",
            ),
        ),
        "student",
    ),
    Mutant(
        "crops drawn from the process's global generator",
        RESUME,
        (
            (
                STUDENT,
                "rng = np.random.default_rng([self.config.seed, index, epoch])",
                "rng = np.random.default_rng(np.random.randint(1 << 30))",
            ),
            (
                STUDENT,
                "    accelerator = launch.start(config)",
                "    accelerator = launch.start(config)\n    np.random.seed(0)",
            ),
        ),
        "student",
    ),
)

FORK = Mutant(
    "none: a fork with another model, another dataset class and one more loss",
    "",
    (
        (
            SCRIPT,
            "nn.Sequential(nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Dropout(dropout))",
            "nn.Sequential(nn.Linear(3 * width, 9), nn.SiLU(), nn.Linear(9, 2 * width), nn.LayerNorm(2 * width))",
        ),
        (
            SCRIPT,
            "def collate(samples: list[dict])",
            "class Thinned(CausalSets):\n"
            "    def __getitem__(self, key):\n"
            "        sample = super().__getitem__(key)\n"
            "        if isinstance(key, tuple):\n"
            "            keep = np.random.default_rng([self.config.seed, *key]).random(len(sample['relations'])) < 0.9\n"
            "            keep[:2] = True\n"
            "            sample['relations'] = sample['relations'][np.ix_(keep, keep)]\n"
            "        return sample\n\n\n"
            "def collate(samples: list[dict])",
        ),
        (SCRIPT, "parts = [CausalSets(store, ids, config)", "parts = [Thinned(store, ids, config)"),
        (
            SCRIPT,
            "terms = tasks.losses(model(batch), batch)",
            "outputs = model(batch)\n                terms = tasks.losses(outputs, batch)",
        ),
        (
            SCRIPT,
            "loss = sum(terms.values())",
            "terms['calm'] = sum(o.square().mean(1).sum() for o in outputs.values()) / sampler.size_of_step\n"
            "                loss = sum(terms.values())",
        ),
    ),
)
