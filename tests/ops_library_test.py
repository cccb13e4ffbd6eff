"""The op out of libsag_ops.so, in Python: packages run with it."""

import os
import pathlib
import unittest

import torch

import aoti_fixture
from sag_export.attention import SCHEMA, declare_op

PACKAGES = pathlib.Path(os.environ["SAG_PACKAGES"])

torch.ops.load_library(os.environ["SAG_OPS_LIBRARY"])
declare_op()  # must see that the op is there


class OpsLibrary(unittest.TestCase):
    def test_the_op_is_attention(self):
        q, k, v = torch.randn(3, 2, 2, 5, 8).unbind()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4)
        self.assertTrue(
            torch.equal(torch.ops.sag.attention(q, k, v, scale=0.4, site="middle.0.0"), expected)
        )

    def test_the_exporter_declares_the_same_schema(self):
        declared = torch._C.parse_schema("sag::" + SCHEMA)
        self.assertEqual(str(declared), str(torch.ops.sag.attention.default._schema))

    def test_the_op_passes_pytorchs_checks(self):
        q, k, v = torch.randn(3, 2, 2, 5, 8).unbind()
        strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        for arguments in ((q, k, v), tuple(strided)):
            torch.library.opcheck(
                torch.ops.sag.attention.default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )

    def test_packages_run_with_it(self):
        unet = aoti_fixture.make_unet()
        package = torch._inductor.aoti_load_package(str(PACKAGES / "unet.pt2"))
        for rows, height, width in ((1, 6, 24), (2, 12, 16), (4, 14, 10)):
            inputs = aoti_fixture.example(rows, height, width).values()
            torch.testing.assert_close(package(*inputs), unet(*inputs), rtol=2e-5, atol=2e-5)


if __name__ == "__main__":
    unittest.main()
