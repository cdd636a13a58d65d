"""The methods of `regret` by their definition: the whole game each episode, explicit averages."""

import numpy as np

from nash_jax.games import trees


class Direct:
  """One run of a rule; `policy` is the one of the next episode."""

  def __init__(self, tree, rule, seed):
    self.tree, self.rule, self.legal = tree, rule, trees.legal(tree)
    self.loss, self.seen, self.plans = (np.zeros(rule.base.shape) for _ in range(3))
    self.episodes, self.random = 0, np.random.Generator(np.random.PCG64(seed))
    self.steps = trees.longest(tree)
    self.policy = self.recursion()

  def _push(self, values, sets, into, combine):
    """Combines values of sets into their parents' entries of `into`."""
    inner = sets[self.tree.before[sets] >= 0]
    combine.at(into, (self.tree.before[inner], self.tree.choice[inner]), values[inner])

  def eta(self):
    """η(x): the least of all sets from x on."""
    mean = (self.seen * self.legal).sum(1) / self.tree.actions
    for sets in reversed(trees.levels(self.tree.depth)):
      inner = sets[self.tree.before[sets] >= 0]
      np.maximum.at(mean, self.tree.before[inner], mean[inner])
    return self.rule.eta / (1 + mean) ** self.rule.power

  def recursion(self):
    """argmin ⟨μ, L⟩ + Σ μ/η log μ/μ⁰, leaves to roots."""
    eta, q = self.eta(), self.loss.copy()
    values, policy = np.zeros(len(q)), np.zeros(q.shape)
    for sets in reversed(trees.levels(self.tree.depth)):
      logits = self.rule.base[sets] - eta[sets, None] * q[sets]
      top = logits.max(1, keepdims=True)
      total = np.exp(logits - top).sum(1, keepdims=True)
      policy[sets] = np.exp(logits - top) / total
      values[sets] = -(top + np.log(total))[:, 0] / eta[sets]
      self._push(values, sets, q, np.add)
    return policy

  def plan(self, policy):
    """Products of own probabilities, [X A]."""
    plan = policy.copy()
    for sets in trees.levels(self.tree.depth)[1:]:
      plan[sets] *= plan[self.tree.before[sets], self.tree.choice[sets]][:, None]
    return plan

  def episode(self):
    """Plays one, by the draws that `regret.learn` has, and learns from it."""
    tree, node, visited = self.tree, 0, ([], [])
    plan = self.plan(self.policy)
    self.plans += plan
    for draw in self.random.random(self.steps):
      if tree.player[node] == trees.TERMINAL:
        continue
      children = tree.first[node] + np.arange(tree.children[node])
      chance, x = tree.chance[children], tree.infoset[node]
      odds = chance if x < 0 else self.policy[x, : len(children)]
      slot = int((draw >= np.cumsum(odds)[:-1]).sum())
      if x >= 0:
        visited[tree.player[node]].append((x, slot))
      node = tree.first[node] + slot
    loss = (tree.high - tree.returns[node]) / (tree.high - tree.low)
    for player, steps in enumerate(visited):
      gamma = {step: self.rule.gamma[step[0]] / (1 + self.seen[step]) ** self.rule.power
               for step in steps}  # fmt: skip
      for step in steps:
        estimate = 1 / (plan[step] + gamma[step])
        self.seen[step] += estimate
        if step == steps[-1]:
          self.loss[step] += estimate * (1 - loss if player else loss)
    self.policy = self.recursion()
    self.episodes += 1

  def average(self):
    """The policy whose plan is the mean of the plans."""
    return self.plans / self.plans.sum(1, keepdims=True)
