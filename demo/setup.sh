# What bin/demo, bin/demo-pretrain and bin/demo-preference begin with, sourced in the project's folder: the environment, with
# its commands in the PATH, flags of training, and say, which prints a headline.
unset PYTHONDONTWRITEBYTECODE # packages are installed without bytecode: it is kept once it is made
bin/make-env .venv-demo constraints/current.txt demo
export PATH="$PWD/.venv-demo/bin:$PATH" XDG_CACHE_HOME="$PWD/demo_run/cache" HF_HUB_DISABLE_PROGRESS_BARS=1
bar=(--trainer.enable_progress_bar false)
[ ! -t 1 ] || bar=(--trainer.enable_progress_bar true)
say() { printf '\n== %s\n' "$*"; }
