"""A script as precheck reads it: its decorator and its key names count; it is never run."""

from nemo.core.config import hydra_runner


@hydra_runner(config_path="conf", config_name="tiny_gpt")
def main(cfg) -> None:
    print(cfg.my_own_key)


if __name__ == "__main__":
    main()
