"""What a real Gemma is asked about in test_real_gemma.py: texts and prompts written for it.

Imports nothing: transformers' interpreter reads it as well (transformers_values.py).
"""

_PLACES = ("the harbour", "the mill", "a field of barley", "the old bridge", "the lighthouse")
_SEEN = (
  "two herons stood in the shallows and did not move",
  "a boy sold pears out of a pram",
  "someone had painted every shutter green",
  "the clock showed ten past four, as it had for years",
  "smoke lay flat over the roofs",
  "a dog with one white ear followed us for a mile",
  "the ferry was late, so we counted its windows",
)
_SAID = (
  "my sister said that it would rain before noon",
  "nobody wanted to carry the tent",
  "the cook asked for salt and got sugar",
  "I wrote three letters and posted none of them",
)


def _diary(days: int) -> str:
  """Returns a diary whose every day differs from those before it."""
  lines = []
  for day in range(1, days + 1):
    place, seen, said = (words[day * 3 % len(words)] for words in (_PLACES, _SEEN, _SAID))
    lines.append(
      f"Day {day}. We walked {7 + day * 5 % 13} miles and reached {place} at dusk. There {seen},"
      f" and {said}. It cost us {day * day % 31} crowns."
    )
  return "\n".join(lines)


TEXTS = {
  "english": "When the tide went out, the children found a bottle with a map inside. It showed an"
  " island that none of the fishermen had ever heard of, and in one corner somebody had written:"
  ' "Bring a lamp."',
  "code": "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
  "    if len(ordered) % 2:\n        return ordered[middle]\n\treturn (ordered[middle - 1] +"
  " ordered[middle]) / 2\n\n\nassert median([3, 1, 2]) == 2  # odd\n",
  "japanese": "昨日の夜、妹は古い灯台まで歩いて行きました。海は静かで、星がとてもきれいでした。",
  "russian": "Утром пошёл снег, и дети остались дома. Бабушка испекла пирог с яблоками, а дед"
  " рассказывал, как он однажды заблудился в лесу.",
  "short": "12 × 7 = 84 😀",
  "long": _diary(60),
}
LONG = 2000  # tokens that are kept of a text, <bos> included: several times a local layer's window
SHORT = tuple(name for name in TEXTS if name != "long")

PROMPTS = (
  "The capital of France is",
  "Once upon a time, in a village by the sea, there lived an old clockmaker who",
  "def fibonacci(n):\n",
  "Рецепт блинов: мука,",
)
NEW_TOKENS = 16
TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hello there"},
  {"role": "assistant", "content": " Hi! "},
  {"role": "user", "content": "What is 7 × 8?\n"},
]
