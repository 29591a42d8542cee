"""Build, train and evaluate tiny-deepseek, the small DeepSeek-V3 style model that ships with the project.

The modules, in the order in which `python -m tools.train_tiny` uses them:

    words, word_problems, word_problems_*   generated word problems: 40 templates, up to three steps of reasoning
    stories, documents                      generated stories; problems and stories as training documents and chat
    prose                                   public-domain books, and the passages held out from them
    tokenizer, corpus                       stage "prepare": tokenizer, held-out sets, token stream of the prose
    model, optimizer, feed                  training forward, Muon and AdamW, worker processes that make the rows
    checkpoint, train                       stage "train"
    measures, evaluate                      stage "eval": the figures of antiphon/data/tiny-deepseek/MODEL_CARD.md

The corpus is a function of the seeds alone. Any change to a word list, to the order of the templates or to the
order in which random numbers are drawn makes another corpus, and another set of held-out problems.
"""
