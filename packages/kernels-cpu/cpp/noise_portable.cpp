#define NAMESPACE portable
#include "noise.inc.hpp"
