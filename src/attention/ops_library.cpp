// libsag_ops.so: the op sag::attention for Python, by torch.ops.load_library, and for other
// programs that only need the op. It only names the function next to which the op is registered. In
// a static build that links the op into this library. In a shared build it loads libsag.so, which
// has the op, so that a process that uses both registers it once. A program that links sag
// statically has the op already and must not load this library too.

#include "sag/attention.h"

namespace sag {

SAG_API void ops_library() {
  ensure_ops_registered();
}

}  // namespace sag
