"""The parts of lines about errors."""

from importlib.metadata import PackageNotFoundError

from resnest_imagenet.errors import list_names, name_extra


def test_lists_of_names_end():
    assert list_names([]) == "" and list_names(["a", "b"]) == "a, b"
    names = [f"class{number}" for number in range(1008)]
    assert list_names(names[:8]) == ", ".join(names[:8])
    assert list_names(names) == f"{', '.join(names[:8])} and 1,000 more"
    assert list_names(names, 1) == "class0 and 1,007 more"


def test_an_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    extra = "the extra [onnx] of resnest-imagenet: pip install"
    assert name_extra("onnx") == f"{extra} 'onnx>=1.18' 'onnxruntime>=1.22' 'onnxscript>=0.7'"
    # A condition on the system is not the installer's to type.
    assert ";" not in name_extra("dali") and "nvidia-dali" in name_extra("dali")

    def find_nothing(_):
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.requires", find_nothing)
    assert name_extra("onnx") == f"{extra} 'resnest-imagenet[onnx]'"
