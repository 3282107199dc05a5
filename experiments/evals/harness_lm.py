"""A model as lm-evaluation-harness calls it. Imports lm_eval, an extra: see evals/harness.py."""

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from experiments import tokenise
from experiments.errors import UserError
from experiments.evals.scoring import Scorer

MOST_TOKENS = 256  # of a continuation, where a task does not say


class HarnessLM(TemplateLM):
  """Log-likelihoods and greedy continuations of text, by a Scorer and a tokenizer."""

  def __init__(self, scorer: Scorer, tokenizer: tokenise.Tokenizer):
    super().__init__()
    self.scorer, self.text = scorer, tokenizer  # `tokenizer` would be one with a chat template

  @property
  def eot_token_id(self) -> int:
    """The end of a document, which also stands before one."""
    return self.text.eos_id

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """The tokens of a string; special tokens are never added, and never found in it."""
    del add_special_tokens
    return self.text.encode(string)

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    """(log-probability, whether it is the likeliest) of (strings, context, continuation)."""
    return self.scorer.loglikelihoods([(context, more) for _, context, more in requests])

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False):
    """The log-probability of each whole string, every token after all that stand before it."""
    del disable_tqdm
    return self.scorer.texts([self.tok_encode(request.args[0]) for request in requests])

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """The likeliest continuation of each string, up to the first of its stop strings."""
    del disable_tqdm
    by_limit: dict[int, list[int]] = {}
    stops = []
    for number, request in enumerate(requests):
      most, until = _settings(request.args[1])
      by_limit.setdefault(most, []).append(number)
      stops.append(until)
    result = [""] * len(requests)
    for most, numbers in by_limit.items():
      said = lambda i, tokens, numbers=numbers: self._until(tokens, stops[numbers[i]])
      contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
      found = self.scorer.greedy(contexts, most, lambda i, tokens, said=said: said(i, tokens)[1])
      for i, (number, tokens) in enumerate(zip(numbers, found)):
        result[number] = said(i, tokens)[0]
    return result

  def _until(self, tokens: list[int], stops: list[str]) -> tuple[str, bool]:
    """(the text before the first stop or the end of the document, whether there was one)."""
    ended = self.eot_token_id in tokens
    text = self.text.decode(tokens[: tokens.index(self.eot_token_id)] if ended else tokens)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))], ended or bool(ends)


def _settings(kwargs: dict) -> tuple[int, list[str]]:
  """(most new tokens, stop strings) of a request; UserError when it asks for sampling."""
  if kwargs.get("do_sample") or float(kwargs.get("temperature") or 0) > 0:
    raise UserError(f"a task asks for sampling ({kwargs}); accepted are greedy continuations")
  until = kwargs.get("until") or []
  stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
  return int(kwargs.get("max_gen_toks") or MOST_TOKENS), stops
