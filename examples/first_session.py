"""Two prompts, one request, one activation that never leaves the shards."""

from insitu import CONFIG, LanguageModel

CONFIG.set_default_api_key("YOUR_API_KEY")
model = LanguageModel("HuggingFaceTB/SmolLM2-135M-Instruct")

with model.session(remote=True) as session:
    with model.trace("The Eiffel Tower is in the city of") as t1:
        hs_29 = model.model.layers[29].output[0][:, -1, :]  # no .save()
        t1_tokens_out = model.lm_head.output.argmax(dim=-1).save()

    with model.trace("Buckingham Palace is in the city of") as t2:
        model.model.layers[1].output[0][:, -1, :] = hs_29[:]
        t2_tokens_out = model.lm_head.output.argmax(dim=-1).save()

print("\nT1 - Original Prediction: ", model.tokenizer.decode(t1_tokens_out[0][-1]))
print("T2 - Modified Prediction: ", model.tokenizer.decode(t2_tokens_out[0][-1]))

with model.session(remote=True) as session:
    session.log("-- Early Stop --")
    session.exit()
