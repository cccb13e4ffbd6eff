// libsag_ops.so: the op sag::attention for Python, by torch.ops.load_library, and for other
// programs that only need the op. It names the function beside which the op is registered, and
// nothing more. In a static build that links the op into this library; in a shared build it loads
// libsag.so, which has the op, so that a process that uses both registers it once. A program with a
// static sag in it has the op already and must not load this library too.

#include "sag/attention.h"

namespace sag {

SAG_API void ops_library() {
  ensure_ops_registered();
}

}  // namespace sag
