"""TorchScript archives with code and weights only: nothing in them tells about the machine that
made them."""

import pathlib
import re
import zipfile

import torch

# The writer adds an id of its own. Debug records hold paths of this machine. Example inputs are
# dead weight.
LEFT_OUT = re.compile(r"\.debug_pkl$|^\.data/serialization_id$|^traced_inputs")


def save(module, path, notes=None):
    """Writes a scripted or traced module. `notes`: texts to lie beside the code, by file name."""
    path = pathlib.Path(path)
    whole = path.with_suffix(".whole")
    module.save(str(whole), _extra_files=notes or {})
    reader, writer = torch._C.PyTorchFileReader(str(whole)), torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        if not LEFT_OUT.search(name):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    whole.unlink()


def check_clean(path, *places):
    """Checks that there is no debug record, that nothing is compressed, and that no record holds a
    path of this machine or one of `places`."""
    places = (*places, pathlib.Path.home(), pathlib.Path.cwd(), torch.__file__)
    here = [str(pathlib.Path(place).resolve()).encode() for place in places]
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            content = archive.read(entry)
            assert entry.compress_type == zipfile.ZIP_STORED, entry.filename
            assert not entry.filename.endswith(".debug_pkl"), entry.filename
            assert not any(place in content for place in here if len(place) > 1), entry.filename
