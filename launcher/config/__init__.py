"""From YAML files to typed values: experiments, suites, mixes."""
