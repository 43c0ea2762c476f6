#define NAMESPACE avx2
#include "release.inc.hpp"
