#!/usr/bin/env bash
# verl's GRPO script (examples/grpo_trainer) for one machine, and what turns it into ReCast.
#
#   run_grpo.sh openonerec|minionerec DATA [key=value ...]
#
# DATA holds model/, rl.parquet and the catalogue (see to_verl.py). VERL_PLATFORM=cpu tries it without a GPU.
set -euo pipefail
form=$1 data=$(realpath "$2")
shift 2
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$data/metrics.jsonl} # a line a step

# -- What was there: verl's own options ------------------------------------------------------------------
stock=(
    algorithm.adv_estimator=grpo
    data.train_files="$data/rl.parquet"
    data.val_files="$data/rl.parquet"
    data.train_batch_size="${TRAIN_BATCH_SIZE:-1024}"
    data.max_prompt_length="${MAX_PROMPT_LENGTH:-1024}"
    data.max_response_length=3
    data.filter_overlong_prompts=True
    data.truncation=error
    actor_rollout_ref.model.path="$data/model"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size="${MINI_BATCH_SIZE:-256}"
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.001
    actor_rollout_ref.actor.kl_loss_type=low_var_kl
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    actor_rollout_ref.rollout.n="${GROUP_SIZE:-32}"
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32
    algorithm.use_kl_in_reward=False
    trainer.critic_warmup=0
    trainer.logger='["console","file"]'
    trainer.project_name=existing-verl
    trainer.experiment_name="$form"
    trainer.n_gpus_per_node="${NUM_GPUS:-8}"
    trainer.nnodes=1
    trainer.val_before_train=False
    trainer.save_freq=-1
    trainer.test_freq=-1
    trainer.total_epochs=15
    hydra.run.dir="$data/hydra"
)

# -- What is added: the method, and rollouts that are items of the catalogue -----------------------------
case $form in
openonerec) # answers without a thought: <think>, nothing, </think>, then the semantic ID
    catalogue="{catalogue: '$data/catalogue.parquet', answer_prefix: '<|sid_begin|>'}"
    prompts=(+data.apply_chat_template_kwargs.enable_thinking=False)
    ;;
minionerec) # its prompts are plain text: no chat template
    catalogue="{catalogue: '$data/toys.index.json'}"
    prompts=(actor_rollout_ref.model.custom_chat_template="'{% for m in messages %}{{ m.content }}{% endfor %}'")
    ;;
esac
recast=(
    algorithm.adv_estimator=recast
    trainer.v1.trainer_mode=recast
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.rollout.name=recast_sid
    +actor_rollout_ref.rollout.custom="$catalogue"
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_recast.rollout.agent_loop.GroupLoopManager
    trainer.v1.sampler.custom_sampler.path=pkg://verl_recast.sampler
    trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer
    "${prompts[@]}"
)

# -- What a try without a GPU needs ----------------------------------------------------------------------
cpu=()
if [[ ${VERL_PLATFORM:-} == cpu ]]; then
    fp32="{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    cpu=(
        trainer.device=cpu
        trainer.n_gpus_per_node=1
        ray_kwargs.ray_init.num_cpus=16 # logical: the machine may have fewer
        +ray_kwargs.ray_init.num_gpus=1
        transfer_queue.backend.SimpleStorage.num_data_storage_units=1
        actor_rollout_ref.rollout.agent.num_workers=1
        reward.num_workers=1
        data.dataloader_num_workers=0
        actor_rollout_ref.rollout.dtype=float32
        actor_rollout_ref.model.use_remove_padding=False
        actor_rollout_ref.model.enable_gradient_checkpointing=False
        +actor_rollout_ref.model.override_config.attn_implementation=sdpa
        actor_rollout_ref.actor.use_torch_compile=False
    )
    for part in actor ref; do
        cpu+=(
            "actor_rollout_ref.$part.fsdp_config.model_dtype=fp32"
            "actor_rollout_ref.$part.fsdp_config.use_torch_compile=False"
            "+actor_rollout_ref.$part.fsdp_config.mixed_precision=$fp32"
        )
    done
fi

exec python -m verl.trainer.main_ppo "${stock[@]}" "${recast[@]}" "${cpu[@]}" "$@"
