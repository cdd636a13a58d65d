"""Kuhn poker by its rules, as a file of `trees.load_json`; sets are written as OpenSpiel does."""

PASS, BET = "pass", "bet"


def game() -> dict:
  """Returns the game: three cards, one each; the higher wins the pot of an ante each and bets."""
  deals = [
    [
      1 / 3,
      {"chance": [[1 / 2, tree(first, second, "")] for second in range(3) if second != first]},
    ]
    for first in range(3)
  ]
  return {"name": "kuhn_poker", "tree": {"chance": deals}}


def tree(first: int, second: int, history: str) -> dict | int:
  """Returns what follows a history of p (pass) and b (bet)."""
  higher = 1 if first > second else -1
  if history in ("pp", "bb", "pbb"):
    return higher * (2 if "b" in history else 1)
  if history in ("bp", "pbp"):
    return 1 if history == "bp" else -1
  mover = len(history) % 2
  actions = {name: tree(first, second, history + name[0]) for name in (PASS, BET)}
  return {"player": mover + 1, "sees": f"{(first, second)[mover]}{history}", "actions": actions}
