"""Silent wrong numbers: the config selects fewer layers than the file has tensors for, and all tensors are applied.

layers_to_transform, exclude_modules or target_modules, edited after training. PEFT applies what is selected and drops
the rest. Right: the same as PEFT, or a refusal that names the field (as for lora_bias and use_dora).
"""

from case import ask, done, expect, factors, load, same, write

first = {k: v for k, v in factors().items() if any(f".layers.{n}." in k for n in (0, 1, 2))}
only_q = {k: v for k, v in factors().items() if "q_proj" in k}
for field, value, selected in (
    ("layers_to_transform", [0, 1, 2], first),
    ("exclude_modules", ["v_proj"], only_q),
    ("target_modules", ["q_proj"], only_q),
):
    write("whole", **{field: value})
    write("selected", selected, **{field: value})
    print(field, load("selected"))
    wanted, answer = ask("selected"), load("whole")
    given = ask("whole") if answer == "loaded" else None
    print("   selected tensors alone", wanted, "| all tensors in the file", given or answer[:160])
    expect(field in answer or same(given, wanted), f"{field} decides, or the file is refused")
done()
