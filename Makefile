# Needs nothing but python3: each target makes its own environment (scripts/environment.sh).
PYTHON ?= python3
TORCH_INDEX ?= auto
ENVIRONMENT = PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" sh scripts/environment.sh

.PHONY: help demo test docs world clean

help:
	@echo 'make demo    measure and edit the embedded adapter, from a wheel; results in build/demo'
	@echo 'make test    lint, type check, import order and every test, as in CI'
	@echo 'make docs    write the generated parts of the documentation again'
	@echo 'make world   build the embedded model, adapter and data again, in place (up to an hour)'
	@echo 'make clean   remove the environments and everything that was built'
	@echo
	@echo 'PYTHON=python3.12    make the environments with this interpreter'
	@echo 'TORCH_INDEX=URL      install torch from this index; "default" is what pip is set up for'

# Runs in another folder, so that the installed wheel is used and not the checkout.
demo:
	@$(ENVIRONMENT) .venv-demo wheel
	@mkdir -p build
	@program="$$PWD/.venv-demo/bin/spectral-surgery"; out="$$PWD/build/demo"; \
	cd build && "$$program" demo --output "$$out" --overwrite

test:
	@$(ENVIRONMENT) .venv editable
	@.venv/bin/ruff check --quiet --output-format concise
	@.venv/bin/ruff format --quiet --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo
	@.venv/bin/python -m pytest -q -n 2

docs:
	@$(ENVIRONMENT) .venv editable
	@.venv/bin/python scripts/docs.py

world:
	@$(ENVIRONMENT) .venv editable
	@rm -rf build/world
	@.venv/bin/python -m spectral_surgery.demo.build --output build/world
	@rm -rf spectral_surgery/demo/world
	@cp -R build/world spectral_surgery/demo/world

clean:
	@rm -rf .venv .venv-demo build dist
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
