#define NAMESPACE portable
#include "release.inc.hpp"
