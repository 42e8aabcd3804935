"""The paper's supervised fine-tuning in small (section 2.2): a procedural world, the recipe over it, its evaluation.

    world, captions, edits   scenes with their truth, and words about them
    tasks, data              dialogs of each task, as files of tokens
    vq                       the image tokenizer's training
    model, train             the transformer's training
    demo                     all of it in order: the embedded model from nothing
    checker, evaluate        what a picture shows, and how often it is right
    figures                  the pictures of docs/

Nothing of the runtime imports this package.
"""
