"""This process and its machine: what comes before `import mxnet`, memory, faults, facts."""
