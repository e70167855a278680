# No stabilizer: takes out those that a config has.
default_hooks = dict(sn=None, ec=None, sp=None)
